"""Distilling the target into its draft: offline before shipping, online while decoding."""
