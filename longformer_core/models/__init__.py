"""The published model classes."""
