# SPDX-License-Identifier: Apache-2.0
"""Where the gate belongs on one machine for one model: times dense and sparse prefill, finds where sparse wins."""
