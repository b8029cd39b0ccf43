"""Gymnasium adapters, scripted policies that record data, and the exact symbol decoder."""
