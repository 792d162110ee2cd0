"""Drafts: small models that propose trees of tokens."""

from vispec.drafts.base import Draft, DraftSession
from vispec.drafts.checkpoint import load_draft
from vispec.drafts.lookup import PromptLookupDraft
from vispec.drafts.medusa import MedusaDraft, MedusaDraftConfig
from vispec.drafts.oracle import OracleDraft
from vispec.drafts.vispec import ViSpecDraft, ViSpecDraftConfig

__all__ = [
    "Draft",
    "DraftSession",
    "MedusaDraft",
    "MedusaDraftConfig",
    "OracleDraft",
    "PromptLookupDraft",
    "ViSpecDraft",
    "ViSpecDraftConfig",
    "load_draft",
]
