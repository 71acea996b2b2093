"""Evaluation of the scores that the authors of HRM-Text published."""
