"""Notices: tells people about runs by a webhook, for those who have no alerting stack."""
