"""The parallel core that moves guest data."""
