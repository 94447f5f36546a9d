// Renders a chat template with llama.cpp's Jinja engine, bare and through its chat front end.
// Usage: render_chat TEMPLATE REQUESTS; REQUESTS is a JSON list of {"context": {...}} for the bare
// engine or {"chat": {...}} for the front end that its server uses. Prints a JSON list of texts;
// what the engine refuses comes out as "ERROR ...".
#include "chat.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

#include <fstream>
#include <iostream>
#include <sstream>

static std::string read_file(const char * path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

static std::string render_bare(const std::string & source, const common_json & context) {
    jinja::lexer lexer;
    auto tokens = lexer.tokenize(source);
    jinja::program program = jinja::parse_from_tokens(tokens);
    jinja::context scope(source);
    jinja::global_from_json(scope, context, true);
    jinja::runtime runtime(scope);
    return jinja::runtime::gather_string_parts(runtime.execute(program))->as_string().str();
}

static std::string render_chat(const std::string & source, const common_json & chat) {
    common_chat_templates_ptr templates(common_chat_templates_init(nullptr, source));
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(chat.at("messages"));
    if (chat.contains("tools")) {
        inputs.tools = common_chat_tools_parse_oaicompat(chat.at("tools"));
    }
    inputs.enable_thinking = chat.at("enable_thinking").get<bool>();
    inputs.add_generation_prompt = chat.at("add_generation_prompt").get<bool>();
    return common_chat_templates_apply(templates.get(), inputs).prompt;
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        std::cerr << "usage: render_chat TEMPLATE REQUESTS" << std::endl;
        return 2;
    }
    const std::string source = read_file(argv[1]);
    common_json results = common_json::array();
    for (const auto & request : common_json::parse(read_file(argv[2]))) {
        try {
            results.push_back(request.contains("chat") ? render_chat(source, request.at("chat"))
                                                       : render_bare(source, request.at("context")));
        } catch (const std::exception & error) {
            results.push_back(std::string("ERROR ") + error.what());
        }
    }
    std::cout << results.dump() << std::endl;
    return 0;
}
