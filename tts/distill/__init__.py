"""Distilling the target into its draft: offline before shipping, online while decoding."""

import logging

# PEFT loads bitsandbytes, which complains about kernels that nothing here asks for
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
