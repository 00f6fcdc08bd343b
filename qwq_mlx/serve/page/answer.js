// An answer as people read it: Markdown by marked, formulas by KaTeX, and of the HTML only what DOMPurify lets through.

import { marked } from "/page/vendor/marked.esm.js";

const { katex, DOMPurify } = window;
const TAGS = ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote"];
const LISTS = ["ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"];
// Code first, in which a dollar is a dollar; then $$..$$, \[..\], \(..\) and $..$.
const FORMULA =
  /(```[^]*?(?:```|$)|`[^`\n]*`)|\$\$([^]+?)\$\$|\\\[([^]+?)\\\]|\\\(([^]+?)\\\)|\$(?![\s$])((?:\\.|[^$`\\\n])+?)(?<![\s\\])\$(?!\d)/g;
const OPEN = "\uE000"; // of a private area, and taken out of the text before
const CLOSE = "\uE001";
const MAX_CHARS = 100_000; // Markdown of any length is read at once

/** Fill an element with a text; nothing in it becomes an element that loads, runs or leads anywhere. */
export function render(element, text) {
  const formulas = [];
  const clean = text.slice(0, MAX_CHARS).replace(/[\uE000\uE001]/g, "\uFFFD");
  const marked_up = clean.replace(FORMULA, (all, code, dollars, brackets, parens, dollar) => {
    if (code !== undefined) return all;
    const isBlock = dollars !== undefined || brackets !== undefined;
    formulas.push({ tex: dollars ?? brackets ?? parens ?? dollar, isBlock, all });
    return `${OPEN}${formulas.length - 1}${CLOSE}`;
  });
  const fragment = DOMPurify.sanitize(marked.parse(marked_up, { gfm: true, async: false }), {
    ALLOWED_TAGS: [...TAGS, ...LISTS],
    ALLOWED_ATTR: ["start"],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  draw(fragment, formulas);
  element.replaceChildren(fragment);
}

/** Put formulas where their numbers stand. */
function draw(fragment, formulas) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (walker.currentNode.data.includes(OPEN)) texts.push(walker.currentNode);
  for (const text of texts) {
    const parts = text.data.split(/\uE000(\d+)\uE001/);
    text.replaceWith(...parts.map((part, place) => (place % 2 ? formula(formulas[Number(part)]) : part)));
  }
}

function formula({ tex, isBlock, all }) {
  const span = document.createElement("span");
  try {
    // to nodes, not to a string: their style is set by script, which a strict policy allows
    katex.render(tex, span, { displayMode: isBlock, throwOnError: true, trust: false, strict: "ignore", maxExpand: 200, maxSize: 20 });
  } catch {
    span.textContent = all; // no formula that KaTeX knows stays as the model wrote it
  }
  return span;
}
