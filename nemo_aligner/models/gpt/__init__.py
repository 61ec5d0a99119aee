# SPDX-License-Identifier: Apache-2.0
"""GPT models on megatron-core. Only the engine and its neighbours here know pipeline stages."""
