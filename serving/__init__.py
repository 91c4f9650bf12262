"""Inference workers: the HTTP API, the micro-batcher in front of one model thread, and the hot swap of weights."""
