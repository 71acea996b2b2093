"""Measurements of this port beside transformers' own class."""
