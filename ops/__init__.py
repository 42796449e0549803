"""What each command does, as a sequence of steps, and the engine that makes every step durable."""
