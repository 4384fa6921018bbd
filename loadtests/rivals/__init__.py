"""Servers that exist only to be compared with; each is a program of its own."""
