"""Test-time speculation: decode, verify, learn."""
