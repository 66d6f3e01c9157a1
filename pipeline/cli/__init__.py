"""The `eopd` command. Modules import nothing heavy before a command needs it: `eopd --help` must be fast."""
