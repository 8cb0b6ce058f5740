const element = (name, text, ...children) => {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
};

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const many = schema.anyOf || schema.oneOf;
  if (many) return [...new Set(many.map(typeOf))].join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items || {}) || "anything"}`;
  return schema.const ? JSON.stringify(schema.const) : schema.enum ? schema.enum.join(" | ") : schema.type || "";
}

function fields(schema) {
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => {
    const star = (schema.required || []).includes(name) ? " *" : "";
    const preset = field.default === undefined || field.default === null ? "" : `default ${JSON.stringify(field.default)}`;
    return element("tr", "", element("td", "", element("code", name + star)), element("td", typeOf(field)),
      element("td", preset), element("td", field.description || ""));
  });
  return element("table", "", ...rows);
}

function route(path, method, operation, schemas) {
  const head = element("summary", "", element("span", method.toUpperCase()), element("code", path),
    document.createTextNode(`  ${operation.description || operation.summary || ""}`));
  head.firstChild.className = "method";
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  const schema = body?.$ref ? schemas[body.$ref.split("/").pop()] : body;
  return element("details", "", head, ...(schema ? [fields(schema)] : []));
}

async function show() {
  const main = document.querySelector("main");
  try {
    const told = await (await fetch("openapi.json")).json();
    const routes = Object.entries(told.paths).flatMap(([path, methods]) => Object.entries(methods)
      .map(([method, operation]) => route(path, method, operation, told.components?.schemas || {})));
    main.replaceChildren(...routes);
  } catch (error) {
    main.textContent = `openapi.json cannot be read: ${error}`;
  }
}
show();
