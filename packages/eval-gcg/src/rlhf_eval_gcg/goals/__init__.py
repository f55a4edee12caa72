"""Goals of attacks: read from files, hub sets and lists, and a small set with harmless targets that is shipped."""
