"""Objectives as pure functions of log-probabilities; imports nothing of dpojax."""
