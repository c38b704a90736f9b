# SPDX-License-Identifier: Apache-2.0
"""Finds where the gate belongs for a model on a machine: times dense and sparse prefill, and sees where sparse wins."""
