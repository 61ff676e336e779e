// Bokeh puts style sheets into its elements; the page's policy lets in those with its nonce only. Loaded before Bokeh.
"use strict";

{
  const { nonce } = document.currentScript;
  const create = document.createElement.bind(document);
  document.createElement = (name, options) => {
    const element = create(name, options);
    if (name === "style" && nonce) element.nonce = nonce;
    return element;
  };
}
