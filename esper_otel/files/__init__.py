"""The command ``files``: what users run next to esper_otel, such as rules, dashboards and collector configurations."""
