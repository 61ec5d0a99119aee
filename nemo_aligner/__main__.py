# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_aligner`` is the command ``nemo-aligner``, so that torchrun and srun can start it too."""

from nemo_aligner.launch.command import main

if __name__ == "__main__":
    main()
