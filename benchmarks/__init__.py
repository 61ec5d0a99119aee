# SPDX-License-Identifier: Apache-2.0
"""What `make bench` measures; see run.py."""

from nemo_aligner.parallel import cpu_shim

# Before anything else imports Megatron, as the scripts do.
cpu_shim.import_megatron()
