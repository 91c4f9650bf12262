"""Running headrace: command line, settings, telemetry SDK, local broker, supervision, deployment."""
