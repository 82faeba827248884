"""The settings of a server, a client and a gateway: one frozen dataclass each, and the only place
of defaults.

A value comes from a keyword argument, a command-line flag or a YAML file; all three use the
field's name, and `from_mapping` turns any of them into a checked configuration. Names that people
know from Petals keep their spelling and their unit, which each field states: times are in seconds.

`client.py`, `server.py` and `gateway.py` hold the settings, `checks.py` the checks that they share,
and `mapping.py` reads them; `old_names.py` keeps old names working, as `moved_modules.py` does for
paths of modules. Nothing here touches the network, the disk (except for a YAML file that the caller
names) or torch. Addresses, devices and names of algorithms are checked by the code that uses them.
"""

from planetserve.config.checks import LOG_LEVELS, TORCH_DTYPES
from planetserve.config.client import ClientConfig
from planetserve.config.gateway import GatewayConfig, is_loopback
from planetserve.config.mapping import (
    check_mapping,
    did_you_mean,
    field_docs,
    from_mapping,
    load_yaml,
)
from planetserve.config.old_names import current_options
from planetserve.config.server import MAX_RECORD_LIFETIME_S, ServerConfig

__all__ = [
    "LOG_LEVELS",
    "MAX_RECORD_LIFETIME_S",
    "TORCH_DTYPES",
    "ClientConfig",
    "GatewayConfig",
    "ServerConfig",
    "check_mapping",
    "current_options",
    "did_you_mean",
    "field_docs",
    "from_mapping",
    "is_loopback",
    "load_yaml",
]
