"""Recorded streams: data sets, replay, baselines and reports."""
