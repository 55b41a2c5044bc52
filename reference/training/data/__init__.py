"""Rows to conversations to samples; README.md tells the formats."""
