"""The `kvrelay` command line: runs clusters and single roles, asks them, and says what this machine can do."""
