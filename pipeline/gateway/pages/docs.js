"use strict";
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
function table(title, rows) {
  const box = document.createDocumentFragment();
  if (!rows.length) return box;
  box.append(element("h3", title));
  const made = element("table");
  for (const [name, text] of rows) {
    const row = element("tr");
    row.append(element("td", name), element("td", text));
    made.append(row);
  }
  box.append(made);
  return box;
}
/** The type of a value. Null is left out: it means the same as an absent field. */
function typeOf(schema) {
  if (schema.enum) return schema.enum.join(", ");
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.type === "array") return "list of " + typeOf(schema.items || {});
  const choices = (schema.anyOf || []).map(typeOf).filter(type => type !== "null");
  return schema.type || choices.join(" or ") || "any";
}
function show(path, method, operation, description) {
  const details = element("details");
  const summary = element("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("span", path, "path"),
                 element("span", " \u2014 " + operation.summary));
  const body = element("div");
  body.append(table("Parameters", (operation.parameters || []).map(
    p => [p.name, p.in + ", " + typeOf(p.schema) + (p.description ? ". " + p.description : "")])));
  const content = operation.requestBody && Object.values(operation.requestBody.content)[0].schema;
  if (content) {
    body.append(table("Body", Object.entries(content.properties || {}).map(
      ([name, schema]) => [name, typeOf(schema) + ((content.required || []).includes(name) ? ", required" : "")])));
  }
  body.append(table("Responses", Object.entries(operation.responses).map(([status, response]) => {
    const known = response.$ref ? description.components.responses[response.$ref.split("/").pop()] : response;
    return [status, known.description];
  })));
  details.append(summary, body);
  return details;
}
fetch("openapi.json").then(answer => answer.json()).then(description => {
  const groups = new Map();
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags[0];
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(show(path, method, operation, description));
    }
  }
  const place = document.getElementById("operations");
  for (const [tag, operations] of groups) place.append(element("h2", tag), ...operations);
}).catch(error => { document.getElementById("about").append(" It could not be read: " + error); });
