"""Drafts: small models that propose trees of tokens."""

from vispec.drafts.base import Draft, DraftSession
from vispec.drafts.checkpoint import load_draft
from vispec.drafts.vispec import ViSpecDraft, ViSpecDraftConfig

__all__ = ["Draft", "DraftSession", "ViSpecDraft", "ViSpecDraftConfig", "load_draft"]
