"""The demo: the whole loop on a real stream, watched while it runs and checked at its end."""
