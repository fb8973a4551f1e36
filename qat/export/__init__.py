"""Exports: a student as a directory that inference engines load."""
