# SPDX-License-Identifier: Apache-2.0
"""Minutes of mixed traffic on a dense and a sparse server: errors, latencies, and memory that grows."""
