# SPDX-License-Identifier: Apache-2.0
"""Files to state and back: .nemo archives, distributed checkpoints, Hugging Face folders, GGUF."""
