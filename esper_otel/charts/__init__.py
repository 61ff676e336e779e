"""Charts in a browser, drawn by Bokeh: the same code for the live page, the report and a notebook."""
