"""`python -m dpojax`."""

from dpojax.cli import main

main()
