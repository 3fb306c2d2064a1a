"""The decisions, pure: no API client, no clock, no environment, no threads. Time and children are passed in."""
