"""A run as a page: what it measured, what it wrote, and what that means.

reading.py   a run's directory, finished or not, to lists of numbers and texts
drawing.py   curves, bars and histograms to SVG that follows the page's colours
panels.py    which of a run's figures are drawn, and the sentence above each
page.py      all of it as one HTML file that needs nothing else; the report command
serve.py     the same page, live, for this machine alone; the watch command
"""
