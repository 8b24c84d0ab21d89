"""Decisions: plain functions over data that take ``now`` as an argument. No socket, clock, thread or asyncio here."""
