"""The error tree of the package.

::

    GeminiError
    ├── ConfigurationError        a setting is impossible; raised before training starts
    │   └── PlacementError        replicas or machines outside the possible range
    ├── CapacityError             host memory cannot hold the buffers
    ├── IntegrityError            stored or received bytes do not match their checksum
    ├── ProtocolError             a peer or worker spoke out of turn, too long, or for another job
    │   └── AuthenticationError   the peer does not know the job's secret
    ├── AgentError                the machine's agent is missing, of another job, or of another version
    ├── RestoreError              no version can be restored, or the stored state does not fit the model
    │   └── LayoutMismatchError   the stored state belongs to another model or world size
    ├── StateChangedError         the state was another one than it was taken for; its version is given up
    ├── OperatorError             a provider of machines refuses, or cannot be reached now
    └── PersistError              the persistent tier cannot be written or read

Every message says what was expected, what was found, and what to do.
"""

from __future__ import annotations

__all__ = [
    "AgentError",
    "AuthenticationError",
    "CapacityError",
    "ConfigurationError",
    "GeminiError",
    "IntegrityError",
    "LayoutMismatchError",
    "OperatorError",
    "PersistError",
    "PlacementError",
    "ProtocolError",
    "RestoreError",
    "StateChangedError",
]


class GeminiError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(GeminiError, ValueError):
    """A setting is impossible."""


class PlacementError(ConfigurationError):
    """Replicas or machines are outside the possible range."""


class CapacityError(GeminiError, MemoryError):
    """Host memory cannot hold the checkpoint buffers."""


class IntegrityError(GeminiError):
    """Bytes do not match their checksum."""


class ProtocolError(GeminiError, ConnectionError):
    """A peer or worker spoke out of turn, too long, or for another job."""


class AuthenticationError(ProtocolError):
    """The peer does not know the job's secret."""


class AgentError(GeminiError, ConnectionError):
    """The machine's agent is missing, of another job, or of another version."""


class RestoreError(GeminiError):
    """No version can be restored."""


class LayoutMismatchError(RestoreError):
    """The stored state belongs to another model or world size."""


class StateChangedError(GeminiError):
    """What is to be saved is not what it was taken for; the next version is right again."""


class OperatorError(GeminiError):
    """A provider of machines refuses, or cannot be reached now."""


class PersistError(GeminiError, OSError):
    """The persistent tier cannot be written or read."""
