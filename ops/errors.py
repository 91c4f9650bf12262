"""What can go wrong while running headrace, as opposed to inside one of its rooms.

OpsError
├── SettingsError            a key, table, value, file or environment variable of the settings is not acceptable
├── LocalBrokerError         the broker for demo and tests did not come up
│   ├── BrokerBinaryMissingError
│   └── PortTakenError       another process listens where we must
└── SupervisionError         a child process cannot be started, or crashes again and again
"""

from __future__ import annotations


class OpsError(Exception):
    """Root of the errors of this room. Each message is one sentence for the person at the terminal."""


class SettingsError(OpsError):
    """The settings cannot be used; the message names the key, where it came from, and the remedy."""


class LocalBrokerError(OpsError):
    """The local broker did not come up."""


class BrokerBinaryMissingError(LocalBrokerError):
    """There is no broker binary for this machine."""


class PortTakenError(LocalBrokerError):
    """Another process listens on the port."""


class SupervisionError(OpsError):
    """A child process cannot be started, or crashed too often."""
