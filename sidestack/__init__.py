"""The one name that is installed: `sidestack.infra`, `sidestack.encoder` and so on are the folders beside this one."""

__version__ = "0.2.0"
