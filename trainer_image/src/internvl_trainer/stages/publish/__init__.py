"""The publish stage: artifacts/, its record, and the Hub."""
