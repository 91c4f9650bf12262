"""Events in, histories out: the event schema, the log, and the worker that applies each event exactly once."""
