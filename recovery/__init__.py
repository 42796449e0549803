"""Resume, rollback and abandon: replays what the log says, whatever the command was."""
