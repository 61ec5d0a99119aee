# SPDX-License-Identifier: Apache-2.0
"""Process groups, devices, collectives: the one package that names torch.distributed and torch.cuda."""

import warnings

# Said at every import of megatron-core, on every rank; one log line of ours says what is used instead.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex)", category=UserWarning)
# megatron-core's own use of what torch and it have deprecated; nothing a user of ours could change.
warnings.filterwarnings("ignore", message=".*(full scope is deprecated|`load_state_dict`|DTensor instead)")
warnings.filterwarnings(
    "ignore", message=".*(argument order of load has|assuming the intent is to load in a single)"
)
warnings.filterwarnings("ignore", message=".*is experimental and still under active development")
