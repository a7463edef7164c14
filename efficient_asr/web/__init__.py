"""Web apps: a page to talk to models, an endpoint that speaks OpenAI's protocol, and an explorer of results."""
