# SPDX-License-Identifier: Apache-2.0
"""Training loops. They see models only through models/alignable_interface.py."""
