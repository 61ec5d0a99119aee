# SPDX-License-Identifier: Apache-2.0
"""A run's folder, schedule and progress: everything about a run that is not learning."""
