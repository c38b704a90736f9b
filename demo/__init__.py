# SPDX-License-Identifier: Apache-2.0
"""`make demo`: install, fetch a small model, serve it, and ask it about a long text."""
