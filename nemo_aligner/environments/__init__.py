# SPDX-License-Identifier: Apache-2.0
"""Judges of responses: people's functions in processes that can be killed. Knows no model and no torch."""
