// node validate_custom.mjs MODULE < object.json: exit status 1 and why, if it is not valid.
import { readFileSync } from "node:fs";
const { validate } = await import(process.argv[2]);
if (!validate(JSON.parse(readFileSync(0, "utf8")))) {
  console.error(JSON.stringify(validate.errors));
  process.exit(1);
}
